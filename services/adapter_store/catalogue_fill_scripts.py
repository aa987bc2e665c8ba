"""Transactions that fill the catalogue from S3: from copies of what it held, and from prefixes that are synced."""

from __future__ import annotations

from services.adapter_store.catalogue_scripts import COMMON, KEYS, WRITING, WRITING_ALWAYS

# name -> {number of its last change, last version given out, aliases, what syncs saw of it, {row...}}
NAME_STATE = (
    COMMON
    + """
local name, synced = ARGV[2], {}
for _, root in ipairs(redis.call('SMEMBERS', key(':roots'))) do
  synced[root] = redis.call('HGET', key(':synced:' .. root), name) or nil
end
return {redis.call('HGET', key(':revisions'), name) or '0', redis.call('HGET', key(':versions'), name) or '0',
        redis.call('HGET', key(':aliases'), name) or '', next(synced) and cjson.encode(synced) or '',
        rows(redis.call('ZRANGEBYLEX', key(':index'), range_of(name)))}
"""
)

# name, number of the change whose copy S3 has now -> {1, number of the copy that is now too many, or ''},
# or {0}: this is not the catalogue that was copied
SETTLE = (
    COMMON
    + """
local name, copied = ARGV[2], tonumber(ARGV[3])
if tonumber(redis.call('HGET', key(':revisions'), name) or '0') < copied then return {0} end
if tonumber(redis.call('HGET', key(':unjournaled'), name) or '0') <= copied then
  redis.call('HDEL', key(':unjournaled'), name)
end
local former = redis.call('HGET', key(':journaled'), name) or ''
if former == ARGV[3] then return {1, ''} end
if former ~= '' and tonumber(former) > copied then return {1, ARGV[3]} end
redis.call('HSET', key(':journaled'), name, ARGV[3])
return {1, former}
"""
)

# name, number of its last change, last version given out, aliases, what syncs saw, then for each version: member,
# digest, tenant, uri, record, marks, last use -> 1; 0 if the catalogue is filled, or has this change already
RESTORE = (
    KEYS
    + """
local name, revision, last_version, aliases, synced = unpack(ARGV, 2, 6)
if redis.call('EXISTS', key(':whole')) == 1 then return 0 end
if tonumber(redis.call('HGET', key(':revisions'), name) or '0') >= tonumber(revision) then return 0 end
redis.call('HSET', key(':revisions'), name, revision)
redis.call('HSET', key(':journaled'), name, revision)
redis.call('HSET', key(':versions'), name, last_version)
keep(':aliases', name, cjson.decode(aliases))
for root, seen in pairs(cjson.decode(synced)) do
  redis.call('SADD', key(':roots'), root)
  redis.call('HSET', key(':synced:' .. root), name, seen)
end
for index = 7, #ARGV, 7 do
  local member, digest, tenant, uri, record, marks, used = unpack(ARGV, index, index + 6)
  redis.call('HSET', key(':contents'), name .. '!' .. digest, tonumber(string.match(member, '%d+$')))
  add(member, digest, tenant, uri, record)
  mark(member, cjson.decode(marks))
  if used ~= '0' then redis.call('HSET', key(':used'), member, used) end
end
return 1
"""
)

# fresh epoch -> 1; 0 if it was filled already. Whoever watched an older history hears RESET. What an older store wrote,
# before there were copies, is copied soon.
FILLED = (
    KEYS
    + """
if not redis.call('SET', key(':whole'), '1', 'NX') then return 0 end
redis.call('SET', key(':epoch'), ARGV[2])
redis.call('DEL', key(':events'), key(':sequence'))
for _, member in ipairs(redis.call('ZRANGE', key(':index'), 0, -1)) do
  local name = name_of(member)
  if redis.call('HEXISTS', key(':revisions'), name) == 0
     and not string.find(redis.call('HGET', key(':records'), member), '"content"', 1, true) then
    redis.call('HSET', key(':unjournaled'), name, redis.call('HINCRBY', key(':revisions'), name, 1))
  end
end
return 1
"""
)

# root, tenant, then for each adapter there: name, digest, uri, record, what was seen
# -> one {'SAME'}, or {'ADDED' or 'CHANGED', version, versions kept for an alias...} each
_DISCOVER = """
local root, tenant = ARGV[4], ARGV[5]
redis.call('SADD', key(':roots'), root)
local function discover(name, digest, uri, record, seen)
  redis.call('HSET', key(':synced:' .. root), name, seen)
  local content = name .. '!' .. digest
  if redis.call('HEXISTS', key(':contents'), content) == 1 then return {'SAME'} end
  local former = found_there(name, uri)
  local version = redis.call('HINCRBY', key(':versions'), name, 1)
  local member, latest = member_of(name, version), former[#former]
  local marks = latest and decode(':marks', latest) or {}
  redis.call('HSET', key(':contents'), content, version)
  add(member, digest, tenant, uri, record)
  mark(member, marks)
  publish('REGISTERED', member)
  -- The first version of a name with nothing to remember is found again by a sync.
  if version > 1 or next(marks) then journal_later(name) end
  return {latest and 'CHANGED' or 'ADDED', version, unpack(supersede(former))}
end
local answers = {}
for index = 6, #ARGV, 5 do answers[#answers + 1] = discover(unpack(ARGV, index, index + 4)) end
return answers
"""

_FORMER = """
local function found_there(name, uri)
  local found = {}
  for _, member in ipairs(redis.call('ZRANGEBYLEX', key(':index'), range_of(name))) do
    local fields = cjson.decode(redis.call('HGET', key(':records'), member))
    if fields.uri == uri and fields.content ~= fields.digest then found[#found + 1] = member end
  end
  return found
end
local function supersede(members)
  local kept = {}
  for _, member in ipairs(members) do
    local version = tonumber(string.match(member, '%d+$'))
    if alias_of(name_of(member), version) then kept[#kept + 1] = version else remove(member) end
  end
  return kept
end
"""

DISCOVER = WRITING + _FORMER + _DISCOVER
DISCOVER_WHILE_FILLING = WRITING_ALWAYS + _FORMER + _DISCOVER

# root, names that are gone there... -> one {versions kept for an alias...} each
VANISH = (
    WRITING
    + _FORMER
    + """
local root, answers = ARGV[4], {}
for index = 5, #ARGV do
  local name = ARGV[index]
  redis.call('HDEL', key(':synced:' .. root), name)
  answers[#answers + 1] = supersede(found_there(name, root .. name .. '/'))
  journal_later(name)
end
return answers
"""
)

# member, old record, new record -> row, or {} if the record was no longer the old one
COMPLETE = (
    WRITING
    + """
local member, old, new = unpack(ARGV, 4, 6)
if redis.call('HGET', key(':records'), member) ~= old then return {} end
redis.call('HSET', key(':records'), member, new)
publish('REGISTERED', member)
return row(member)
"""
)
