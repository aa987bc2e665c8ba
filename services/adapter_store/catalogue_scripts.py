"""The catalogue's transactions, as Lua that Redis runs atomically.

Keys, all with one prefix and so in one cluster slot:
  :whole          set when the catalogue has everything that S3 knows of it; without it Redis was emptied or is new,
                  and every script but those that fill it answers NOTWHOLE: what is not found may exist
  :epoch          names this history; made with the first change or watch
  :sequence       number of the last change
  :events         stream of changes; entry `N-0` is change number N, so a gap shows as a missing number
  :records        hash: index member -> record as JSON; immutable but for where its files lie
  :marks          hash: index member -> {"labels": {...}, "pinned": true} as JSON, where there are any
  :aliases        hash: name -> {alias: version} as JSON, where there are any
  :used           hash: index member -> when it was last used, in milliseconds
  :pinned         set of the index members that are pinned
  :index          sorted set of index members, all with score 0: sorted by name, then version
  :index:<tenant> the same for one tenant
  :versions       hash: name -> last version given out; never removed, so versions are never reused
  :contents       hash: `<name>!<digest>` -> version
  :digest:<d>     set of index members with this content
  :source:<uri>   set of index members whose files lie there
  :unreferenced   sorted set of managed URIs without a version: score = time its upload began, or 0 = to be removed.
                  An upload enters its URI before it writes, so no crash leaves files behind for good; registering
                  takes it out. What has score 0 is never used again, so removing its files races with nobody.
  :revisions      hash: name -> number of its last change; orders its copies in S3
  :unjournaled    hash: name -> number of the last change that S3 may not have yet
  :journaled      hash: name -> number of the change whose copy S3 has
  :roots          set of the prefixes that were synced
  :synced:<root>  hash: name -> what the last sync saw there, as JSON [config ETag, bytes, weights ETag, bytes]

A row is {member, record, marks, aliases of its name, last use}, each '' where there is nothing.
Every script gets ARGV: prefix, then its own arguments; those that write get prefix, max_events, a fresh epoch.
"""

from __future__ import annotations

NOT_WHOLE = "NOTWHOLE"

KEYS = """
local prefix = ARGV[1]
local function key(name) return prefix .. name end
local function member_of(name, version) return string.format('%s!%010d', name, version) end
local function name_of(member) return string.match(member, '^[^!]*') end
local function range_of(name) return '[' .. name .. '!', '[' .. name .. '!\\127' end
local function decode(hash, field) return cjson.decode(redis.call('HGET', key(hash), field) or '{}') end
local function keep(hash, field, values)
  if next(values) == nil then redis.call('HDEL', key(hash), field)
  else redis.call('HSET', key(hash), field, cjson.encode(values)) end
end
local function row(member)
  local record = redis.call('HGET', key(':records'), member)
  if not record then return nil end
  return {member, record, redis.call('HGET', key(':marks'), member) or '',
          redis.call('HGET', key(':aliases'), name_of(member)) or '', redis.call('HGET', key(':used'), member) or ''}
end
local function rows(members)
  local found = {}
  for _, member in ipairs(members) do
    for _, part in ipairs(row(member) or {}) do found[#found + 1] = part end
  end
  return found
end
local function count_of(name, index)
  return redis.call('ZLEXCOUNT', key(index), range_of(name))
end
local function is_foreign(name, tenant) return count_of(name, ':index') > count_of(name, ':index:' .. tenant) end
local function refer(uri, member)
  redis.call('SADD', key(':source:' .. uri), member)
  redis.call('ZREM', key(':unreferenced'), uri)
end
local function add(member, digest, tenant, uri, record)
  redis.call('HSET', key(':records'), member, record)
  redis.call('ZADD', key(':index'), 0, member)
  redis.call('ZADD', key(':index:' .. tenant), 0, member)
  redis.call('SADD', key(':digest:' .. digest), member)
  refer(uri, member)
end
local function mark(member, marks)
  keep(':marks', member, marks)
  redis.call(marks.pinned and 'SADD' or 'SREM', key(':pinned'), member)
end
"""

COMMON = f"{KEYS}if redis.call('EXISTS', key(':whole')) == 0 then return redis.error_reply('{NOT_WHOLE}') end\n"

WRITING_ALWAYS = (
    KEYS
    + """
local max_events, fresh_epoch = ARGV[2], ARGV[3]
local function journal_later(name)
  redis.call('HSET', key(':unjournaled'), name, redis.call('HINCRBY', key(':revisions'), name, 1))
end
local function publish(kind, member)
  local told = row(member)
  redis.call('SET', key(':epoch'), fresh_epoch, 'NX')
  local number = redis.call('INCR', key(':sequence'))
  redis.call('XADD', key(':events'), 'MAXLEN', max_events, string.format('%.0f-0', number),
             'kind', kind, 'member', member, 'record', told[2], 'marks', told[3], 'aliases', told[4])
end
local function can_use(uri, managed)
  if managed ~= '1' or redis.call('SCARD', key(':source:' .. uri)) > 0 then return true end
  local score = redis.call('ZSCORE', key(':unreferenced'), uri)
  return score and tonumber(score) > 0
end
local function remove(member)
  local told = row(member)
  local fields, name = cjson.decode(told[2]), name_of(member)
  publish('DELETED', member)
  redis.call('HDEL', key(':records'), member)
  redis.call('HDEL', key(':contents'), name .. '!' .. fields['digest'])
  redis.call('ZREM', key(':index'), member)
  redis.call('ZREM', key(':index:' .. fields['tenant']), member)
  redis.call('SREM', key(':digest:' .. fields['digest']), member)
  redis.call('SREM', key(':source:' .. fields['uri']), member)
  redis.call('HDEL', key(':used'), member)
  mark(member, {})
  if fields['managed'] and redis.call('SCARD', key(':source:' .. fields['uri'])) == 0 then
    redis.call('ZADD', key(':unreferenced'), 0, fields['uri'])
  end
  return told, redis.call('SCARD', key(':digest:' .. fields['digest']))
end
local function alias_of(name, version)
  for alias, meant in pairs(decode(':aliases', name)) do
    if meant == tonumber(version) then return alias end
  end
end
"""
)

WRITING = COMMON + WRITING_ALWAYS.removeprefix(KEYS)

# nothing -> 1
CHECK = COMMON + "return 1"

# name, digest, tenant, uri, managed, record, marks, '1' if no version of the name may be another tenant's
# -> {outcome, row...}; outcome CREATED, EXISTS, GONE or FOREIGN
REGISTER = (
    WRITING
    + """
local name, digest, tenant, uri, managed, record, marks, exclusive = unpack(ARGV, 4, 11)
if exclusive == '1' and is_foreign(name, tenant) then return {'FOREIGN'} end
local content = name .. '!' .. digest
local version = redis.call('HGET', key(':contents'), content)
if version then return {'EXISTS', unpack(row(member_of(name, version)))} end
if not can_use(uri, managed) then return {'GONE'} end
version = redis.call('HINCRBY', key(':versions'), name, 1)
local member = member_of(name, version)
redis.call('HSET', key(':contents'), content, version)
add(member, digest, tenant, uri, record)
mark(member, cjson.decode(marks))
publish('REGISTERED', member)
journal_later(name)
return {'CREATED', unpack(row(member))}
"""
)

# member, old record, new record, old uri, new uri, managed -> row, or {} if the record was no longer the old one
RELOCATE = (
    WRITING
    + """
local member, old, new, old_uri, uri, managed = unpack(ARGV, 4, 9)
if redis.call('HGET', key(':records'), member) ~= old or not can_use(uri, managed) then return {} end
redis.call('HSET', key(':records'), member, new)
redis.call('SREM', key(':source:' .. old_uri), member)
refer(uri, member)
publish('REGISTERED', member)
journal_later(name_of(member))
return row(member)
"""
)

# name, version or '' for all, the tenant whose all versions of the name must be or ''
# -> {'ALIASED', alias}, {'FOREIGN'}, or {'DONE', {versions left with this digest, row...}, ...}
DELETE = (
    WRITING
    + """
local name, version, owner = unpack(ARGV, 4, 6)
if owner ~= '' and is_foreign(name, owner) then return {'FOREIGN'} end
local members
if version == '' then
  members = redis.call('ZRANGEBYLEX', key(':index'), range_of(name))
else
  members = {member_of(name, version)}
  local alias = alias_of(name, version)
  if alias then return {'ALIASED', alias} end
end
local deleted = {'DONE'}
for _, member in ipairs(members) do
  if redis.call('HEXISTS', key(':records'), member) == 1 then
    local told, left = remove(member)
    deleted[#deleted + 1] = {left, unpack(told)}
  end
end
if version == '' then redis.call('HDEL', key(':aliases'), name) end
if deleted[2] then journal_later(name) end
return deleted
"""
)

# uri -> 1 if no version uses it: its files may be removed, and will not be used again
CONDEMN = (
    COMMON
    + """
if redis.call('SCARD', key(':source:' .. ARGV[2])) > 0 then return 0 end
redis.call('ZADD', key(':unreferenced'), 0, ARGV[2])
return 1
"""
)

# name, version or '', alias or '' (neither: the newest) -> row or {}
LOOK_UP = (
    COMMON
    + """
local name, version, alias = ARGV[2], ARGV[3], ARGV[4]
if alias ~= '' then version = decode(':aliases', name)[alias] end
if not version then return {} end
if version ~= '' then return row(member_of(name, version)) or {} end
local lowest, highest = range_of(name)
return rows(redis.call('ZREVRANGEBYLEX', key(':index'), highest, lowest, 'LIMIT', 0, 1))
"""
)

# name, limit -> {number of its versions, its aliases, its newest index members...}
WHAT_THERE_IS = (
    COMMON
    + """
local lowest, highest = range_of(ARGV[2])
local members = redis.call('ZREVRANGEBYLEX', key(':index'), highest, lowest, 'LIMIT', 0, ARGV[3])
return {redis.call('ZLEXCOUNT', key(':index'), lowest, highest), redis.call('HGET', key(':aliases'), ARGV[2]) or '',
        unpack(members)}
"""
)

# name, tenant -> {number of the name's versions, of those of the tenant, of those of nobody in particular}
COUNT = (
    COMMON
    + "return {count_of(ARGV[2], ':index'), count_of(ARGV[2], ':index:' .. ARGV[3]), count_of(ARGV[2], ':index:')}"
)

# digest -> rows
FIND_DIGEST = COMMON + "return rows(redis.call('SMEMBERS', key(':digest:' .. ARGV[2])))"

# index name, lowest, highest (ZRANGEBYLEX bounds), limit -> rows
PAGE = COMMON + "return rows(redis.call('ZRANGEBYLEX', key(ARGV[2]), ARGV[3], ARGV[4], 'LIMIT', 0, ARGV[5]))"

# fresh epoch -> {epoch, number of the last change}
POSITION = (
    COMMON
    + """
redis.call('SET', key(':epoch'), ARGV[2], 'NX')
return {redis.call('GET', key(':epoch')), tonumber(redis.call('GET', key(':sequence')) or '0')}
"""
)

# epoch, number of the last change seen, limit -> {1, {number, kind, row...}, ...}, or {0} if some are gone
CHANGES = (
    COMMON
    + """
local seen = tonumber(ARGV[3])
local last = tonumber(redis.call('GET', key(':sequence')) or '0')
if redis.call('GET', key(':epoch')) ~= ARGV[2] or seen > last then return {0} end
if seen == last then return {1} end
local answer = {1}
local start = string.format('%.0f-0', seen + 1)
for _, entry in ipairs(redis.call('XRANGE', key(':events'), start, '+', 'COUNT', ARGV[4])) do
  local fields = entry[2]
  answer[#answer + 1] = {entry[1], fields[2], fields[4], fields[6], fields[8], fields[10], ''}
end
if not answer[2] or answer[2][1] ~= start then return {0} end
return answer
"""
)
