"""Heartbeats of replicas, as Lua that Redis runs atomically. The only clock is Redis's.

Keys, beside those of the catalogue (and like them of one catalogue):
  :replicas   hash: replica id -> `<milliseconds of its last beat> <incarnation> <what it says of itself, as JSON>`
  :duty       incarnation of the replica that does what one is enough for; ends by itself unless it beats

They do not belong to the catalogue: an emptied Redis has them again with the next beats.
"""

from __future__ import annotations

from services.adapter_store.catalogue_scripts import KEYS

_CLOCK = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local id, incarnation = ARGV[2], ARGV[3]
local function last_beat(text) return string.match(text or '', '^(%d+) (%S+) (.*)$') end
"""

BEAT = (
    KEYS
    + _CLOCK
    + """
local told, ttl, takes_over, wants_duty = ARGV[4], tonumber(ARGV[5]), ARGV[6] == '1', ARGV[7] == '1'
local at, whose = last_beat(redis.call('HGET', key(':replicas'), id))
local is_displaced = at and whose ~= incarnation and not takes_over and now - tonumber(at) < ttl
if is_displaced then
  wants_duty = false
else
  redis.call('HSET', key(':replicas'), id, string.format('%.0f %s %s', now, incarnation, told))
end
local holder = redis.call('GET', key(':duty'))
if holder == incarnation and not wants_duty then
  redis.call('DEL', key(':duty'))
elseif wants_duty and (not holder or holder == incarnation) then
  redis.call('SET', key(':duty'), incarnation, 'PX', ttl)
  holder = incarnation
end
local answer = {whose == incarnation and 1 or 0, is_displaced and 1 or 0,
                wants_duty and holder == incarnation and 1 or 0}
local all = redis.call('HGETALL', key(':replicas'))
for index = 1, #all, 2 do
  local at, whose, told = last_beat(all[index + 1])
  if not at or now - tonumber(at) > 100 * ttl then
    redis.call('HDEL', key(':replicas'), all[index])
  else
    for _, part in ipairs({all[index], whose, now - tonumber(at), told}) do answer[#answer + 1] = part end
  end
end
return answer
"""
)
"""id, incarnation, JSON, milliseconds after which a beat is stale, whether it may take the id over from a live
incarnation, whether it would be on duty
-> {its beat was known, it was displaced by another incarnation, it is on duty, then of each replica: id, incarnation,
milliseconds since its beat, JSON}. What was displaced is not noted."""

LEAVE = (
    KEYS
    + _CLOCK
    + """
local at, whose = last_beat(redis.call('HGET', key(':replicas'), id))
if whose == incarnation then redis.call('HDEL', key(':replicas'), id) end
if redis.call('GET', key(':duty')) == incarnation then redis.call('DEL', key(':duty')) end
"""
)
"""id, incarnation. It is gone at once, and another may be on duty."""
