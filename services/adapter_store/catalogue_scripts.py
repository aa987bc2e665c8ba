"""The catalogue's transactions, as Lua that Redis runs atomically.

Keys, all with one prefix and so in one cluster slot:
  :epoch          names this history; made with the first change or watch
  :sequence       number of the last change
  :events         stream of changes; entry `N-0` is change number N, so a gap shows as a missing number
  :records        hash: index member -> record as JSON
  :index          sorted set of index members, all with score 0: sorted by name, then version
  :index:<tenant> the same for one tenant
  :versions       hash: name -> last version given out; never removed, so versions are never reused
  :contents       hash: `<name>!<digest>` -> version
  :digest:<d>     set of index members with this content
  :source:<uri>   set of index members whose files lie there
  :unreferenced   sorted set of managed URIs without a version: score = time its upload began, or 0 = to be removed.
                  An upload enters its URI before it writes, so no crash leaves files behind for good; registering
                  takes it out. What has score 0 is never used again, so removing its files races with nobody.

Every script gets ARGV: prefix, then its own arguments; those that write get prefix, max_events, a fresh epoch.
"""

from __future__ import annotations

_COMMON = """
local prefix = ARGV[1]
local function key(name) return prefix .. name end
local function member_of(name, version) return string.format('%s!%010d', name, version) end
"""

_WRITING = (
    _COMMON
    + """
local max_events, fresh_epoch = ARGV[2], ARGV[3]
local function publish(kind, member, record)
  redis.call('SET', key(':epoch'), fresh_epoch, 'NX')
  local number = redis.call('INCR', key(':sequence'))
  redis.call('XADD', key(':events'), 'MAXLEN', max_events, string.format('%.0f-0', number),
             'kind', kind, 'member', member, 'record', record)
end
local function can_use(uri, managed)
  if managed ~= '1' or redis.call('SCARD', key(':source:' .. uri)) > 0 then return true end
  local score = redis.call('ZSCORE', key(':unreferenced'), uri)
  return score and tonumber(score) > 0
end
local function refer(uri, member)
  redis.call('SADD', key(':source:' .. uri), member)
  redis.call('ZREM', key(':unreferenced'), uri)
end
"""
)

# name, digest, tenant, uri, managed, record -> {outcome, member, record}; outcome CREATED, EXISTS or GONE
REGISTER = (
    _WRITING
    + """
local name, digest, tenant, uri, managed, record = unpack(ARGV, 4, 9)
local content = name .. '!' .. digest
local version = redis.call('HGET', key(':contents'), content)
if version then
  local member = member_of(name, version)
  return {'EXISTS', member, redis.call('HGET', key(':records'), member)}
end
if not can_use(uri, managed) then return {'GONE', '', ''} end
version = redis.call('HINCRBY', key(':versions'), name, 1)
local member = member_of(name, version)
redis.call('HSET', key(':contents'), content, version)
redis.call('HSET', key(':records'), member, record)
redis.call('ZADD', key(':index'), 0, member)
redis.call('ZADD', key(':index:' .. tenant), 0, member)
redis.call('SADD', key(':digest:' .. digest), member)
refer(uri, member)
publish('REGISTERED', member, record)
return {'CREATED', member, record}
"""
)

# member, old record, new record, old uri, new uri, managed -> 1 if the record was still the old one
RELOCATE = (
    _WRITING
    + """
local member, old, new, old_uri, uri, managed = unpack(ARGV, 4, 9)
if redis.call('HGET', key(':records'), member) ~= old or not can_use(uri, managed) then return 0 end
redis.call('HSET', key(':records'), member, new)
redis.call('SREM', key(':source:' .. old_uri), member)
refer(uri, member)
publish('REGISTERED', member, new)
return 1
"""
)

# name, version or '' for all -> one {member, record, versions left with this digest} each
DELETE = (
    _WRITING
    + """
local name, version = ARGV[4], ARGV[5]
local members
if version == '' then
  members = redis.call('ZRANGEBYLEX', key(':index'), '[' .. name .. '!', '[' .. name .. '!\\127')
else
  members = {member_of(name, version)}
end
local deleted = {}
for _, member in ipairs(members) do
  local record = redis.call('HGET', key(':records'), member)
  if record then
    local fields = cjson.decode(record)
    redis.call('HDEL', key(':records'), member)
    redis.call('HDEL', key(':contents'), name .. '!' .. fields['digest'])
    redis.call('ZREM', key(':index'), member)
    redis.call('ZREM', key(':index:' .. fields['tenant']), member)
    redis.call('SREM', key(':digest:' .. fields['digest']), member)
    redis.call('SREM', key(':source:' .. fields['uri']), member)
    if fields['managed'] and redis.call('SCARD', key(':source:' .. fields['uri'])) == 0 then
      redis.call('ZADD', key(':unreferenced'), 0, fields['uri'])
    end
    publish('DELETED', member, record)
    deleted[#deleted + 1] = {member, record, redis.call('SCARD', key(':digest:' .. fields['digest']))}
  end
end
return deleted
"""
)

# uri -> 1 if no version uses it: its files may be removed, and will not be used again
CONDEMN = (
    _COMMON
    + """
if redis.call('SCARD', key(':source:' .. ARGV[2])) > 0 then return 0 end
redis.call('ZADD', key(':unreferenced'), 0, ARGV[2])
return 1
"""
)

# name, version or '' for the newest -> {member, record} or {}
LOOK_UP = (
    _COMMON
    + """
local name, version = ARGV[2], ARGV[3]
local member
if version == '' then
  member = redis.call('ZREVRANGEBYLEX', key(':index'), '[' .. name .. '!\\127', '[' .. name .. '!', 'LIMIT', 0, 1)[1]
else
  member = member_of(name, version)
end
local record = member and redis.call('HGET', key(':records'), member)
if not record then return {} end
return {member, record}
"""
)

# digest -> {member, record, member, record, ...}
FIND_DIGEST = (
    _COMMON
    + """
local found = {}
for _, member in ipairs(redis.call('SMEMBERS', key(':digest:' .. ARGV[2]))) do
  found[#found + 1] = member
  found[#found + 1] = redis.call('HGET', key(':records'), member)
end
return found
"""
)

# index name, lowest, highest (ZRANGEBYLEX bounds), limit -> {member, record, member, record, ...}
PAGE = (
    _COMMON
    + """
local found = {}
for _, member in ipairs(redis.call('ZRANGEBYLEX', key(ARGV[2]), ARGV[3], ARGV[4], 'LIMIT', 0, ARGV[5])) do
  found[#found + 1] = member
  found[#found + 1] = redis.call('HGET', key(':records'), member)
end
return found
"""
)

# fresh epoch -> {epoch, number of the last change}
POSITION = (
    _COMMON
    + """
redis.call('SET', key(':epoch'), ARGV[2], 'NX')
return {redis.call('GET', key(':epoch')), tonumber(redis.call('GET', key(':sequence')) or '0')}
"""
)

# epoch, number of the last change seen, limit -> {1, {number, kind, member, record}, ...}, or {0} if some are gone
CHANGES = (
    _COMMON
    + """
local seen = tonumber(ARGV[3])
local last = tonumber(redis.call('GET', key(':sequence')) or '0')
if redis.call('GET', key(':epoch')) ~= ARGV[2] or seen > last then return {0} end
if seen == last then return {1} end
local answer = {1}
local start = string.format('%.0f-0', seen + 1)
for _, entry in ipairs(redis.call('XRANGE', key(':events'), start, '+', 'COUNT', ARGV[4])) do
  local fields = entry[2]
  answer[#answer + 1] = {entry[1], fields[2], fields[4], fields[6]}
end
if not answer[2] or answer[2][1] ~= start then return {0} end
return answer
"""
)
