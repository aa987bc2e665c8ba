"""What is kept of tenants and keys, and the transactions on it, as Lua that Redis runs atomically.

Keys, all with one prefix and so in one cluster slot:
  :tenants        sorted set of tenants' names, all with score 0
  :tenant:<name>  hash: requests_per_minute, tokens_per_minute, max_concurrent, adapters (patterns, by commas),
                  max_priority; what an older release did not write is 0
  :keys           sorted set of `<tenant>!<key id>`, all with score 0
  :key:<id>       hash: tenant, digest (of the secret), label, created (seconds)

Each script gets ARGV: prefix, then its own arguments. It may run twice with the same effect.
"""

from __future__ import annotations

_TENANT = """
local prefix = ARGV[1]
local function tenant_row(name)
  local row = redis.call('HMGET', prefix .. ':tenant:' .. name,
                         'requests_per_minute', 'tokens_per_minute', 'max_concurrent', 'adapters', 'max_priority')
  return {name, row[1] or '0', row[2] or '0', row[3] or '0', row[4] or '', row[5] or '0'}
end
local function key_row(id)
  local row = redis.call('HMGET', prefix .. ':key:' .. id, 'tenant', 'digest', 'label', 'created')
  if not row[1] then return nil end
  return {id, row[1], row[2], row[3], row[4]}
end
"""

FIND_KEY = f"""{_TENANT}
local found = key_row(ARGV[2])
if not found then return nil end
return {{found[3], tenant_row(found[2])}}
"""
"""id -> {digest, tenant}, nil if there is no such key."""

SET_TENANT = f"""{_TENANT}
redis.call('ZADD', prefix .. ':tenants', 0, ARGV[2])
for i = 3, #ARGV, 2 do redis.call('HSET', prefix .. ':tenant:' .. ARGV[2], ARGV[i], ARGV[i + 1]) end
return tenant_row(ARGV[2])
"""
"""name, then fields and values -> tenant; what is not named stays."""

GET_TENANT = f"""{_TENANT}
if not redis.call('ZSCORE', prefix .. ':tenants', ARGV[2]) then return nil end
return tenant_row(ARGV[2])
"""
"""name -> tenant, nil if there is none."""

LIST_TENANTS = f"""{_TENANT}
local rows = {{}}
local after = ARGV[2] == '' and '-' or '(' .. ARGV[2]
for _, name in ipairs(redis.call('ZRANGEBYLEX', prefix .. ':tenants', after, '+', 'LIMIT', 0, ARGV[3])) do
  rows[#rows + 1] = tenant_row(name)
end
return rows
"""
"""after, count -> tenants by name."""

CREATE_KEY = f"""{_TENANT}
local id, tenant = ARGV[2], ARGV[3]
if not redis.call('ZSCORE', prefix .. ':tenants', tenant) then return nil end
if not key_row(id) then
  redis.call('HSET', prefix .. ':key:' .. id, 'tenant', tenant, 'digest', ARGV[4], 'label', ARGV[5],
             'created', redis.call('TIME')[1])
  redis.call('ZADD', prefix .. ':keys', 0, tenant .. '!' .. id)
end
return key_row(id)
"""
"""id, tenant, digest, label -> key, nil if there is no such tenant."""

REVOKE_KEY = f"""{_TENANT}
local found = key_row(ARGV[2])
if not found then return 0 end
redis.call('DEL', prefix .. ':key:' .. ARGV[2])
redis.call('ZREM', prefix .. ':keys', found[2] .. '!' .. ARGV[2])
return 1
"""
"""id -> how many keys there were."""

LIST_KEYS = f"""{_TENANT}
local first = ARGV[2] ~= '' and '(' .. ARGV[2] or ARGV[3] ~= '' and '[' .. ARGV[3] .. '!' or '-'
local last = ARGV[3] ~= '' and '[' .. ARGV[3] .. '!~' or '+'
local rows = {{}}
for _, member in ipairs(redis.call('ZRANGEBYLEX', prefix .. ':keys', first, last, 'LIMIT', 0, ARGV[4])) do
  rows[#rows + 1] = key_row(string.match(member, '[^!]*$'))
end
return rows
"""
"""after (`tenant!id`), tenant (empty: all), count -> keys by tenant and id."""
