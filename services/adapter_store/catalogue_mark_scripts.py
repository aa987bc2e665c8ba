"""Transactions on what an operator may change of a version: aliases, labels, pins; and on its last use."""

from __future__ import annotations

from services.adapter_store.catalogue_scripts import COMMON, WRITING

# name, alias, version or '' to remove it, the version it must mean now ('' any, 0 none), most aliases of a name
# -> {'DONE', row...}, {'CHANGED', version it means now}, {'UNKNOWN'} version, {'MISSING'} alias, {'FULL'}
SET_ALIAS = (
    WRITING
    + """
local name, alias, version, expected, limit = unpack(ARGV, 4, 8)
local aliases = decode(':aliases', name)
local present, count = aliases[alias], 0
for _ in pairs(aliases) do count = count + 1 end
local wanted = tonumber(version)
local member = wanted and member_of(name, wanted)
if member and redis.call('HEXISTS', key(':records'), member) == 0 then return {'UNKNOWN'} end
if not wanted and not present then return {'MISSING'} end
if expected ~= '' and (present or 0) ~= tonumber(expected) then return {'CHANGED', present or 0} end
if wanted == present then return {'DONE', unpack(row(member))} end
if wanted and not present and count >= tonumber(limit) then return {'FULL'} end
aliases[alias] = wanted
keep(':aliases', name, aliases)
member = member or member_of(name, present)
publish('REGISTERED', member)
journal_later(name)
return {'DONE', unpack(row(member))}
"""
)

# name, version, changes {"set": {...}, "remove": [...], "pinned": true, false or absent}, most labels,
# most bytes pinned -> {'DONE', row...}, {'UNKNOWN'}, {'LABELS', how many}, {'PINS', bytes pinned by others}
MARK = (
    WRITING
    + """
local name, version, changes, max_labels, max_bytes = unpack(ARGV, 4, 8)
local member = member_of(name, version)
local told = row(member)
if not told then return {'UNKNOWN'} end
changes = cjson.decode(changes)
local marks = decode(':marks', member)
local labels, count = marks.labels or {}, 0
for label, value in pairs(changes.set) do labels[label] = value end
for _, label in ipairs(changes.remove) do labels[label] = nil end
for _ in pairs(labels) do count = count + 1 end
if count > tonumber(max_labels) then return {'LABELS', count} end
marks.labels = count > 0 and labels or nil
if changes.pinned and not marks.pinned then
  local fields, bytes, seen = cjson.decode(told[2]), 0, {}
  for _, other in ipairs(redis.call('SMEMBERS', key(':pinned'))) do
    local others = cjson.decode(redis.call('HGET', key(':records'), other))
    if not seen[others.digest] then bytes = bytes + others.packed_bytes end
    seen[others.digest] = true
  end
  if not seen[fields.digest] and bytes + fields.packed_bytes > tonumber(max_bytes) then return {'PINS', bytes} end
end
if changes.pinned ~= nil then marks.pinned = changes.pinned or nil end
mark(member, marks)
local now = row(member)
if now[3] ~= told[3] then
  publish('REGISTERED', member)
  journal_later(name)
end
return {'DONE', unpack(now)}
"""
)

# member, milliseconds, member, milliseconds, ... -> how many of them exist; time only goes on
USE = (
    COMMON
    + """
local count = 0
for index = 2, #ARGV, 2 do
  local member, time = ARGV[index], ARGV[index + 1]
  if redis.call('HEXISTS', key(':records'), member) == 1 then
    count = count + 1
    if tonumber(time) > tonumber(redis.call('HGET', key(':used'), member) or '0') then
      redis.call('HSET', key(':used'), member, time)
    end
  end
end
return count
"""
)

# nothing -> rows of the pinned versions
PINNED = COMMON + "return rows(redis.call('SMEMBERS', key(':pinned')))"
