"""The limits' transactions, as Lua that Redis runs atomically: right however many gateways share them.

A rate is a bucket that holds a minute's worth and fills evenly. Of a bucket one number is kept: when it will be full
again (the generic cell rate algorithm's "theoretical arrival time"). Taking from it moves that moment on; a moment more
than a minute ahead is a debt, which is worked off before anything else is let in. The only clock is Redis's.

Keys:
  :requests:<tenant>  microseconds since the epoch at which the bucket of requests is full
  :tokens:<tenant>    the same of tokens
  :leases:<tenant>    sorted set of generations that run: lease id, with the time at which it ends unless renewed

Each script gets ARGV: prefix, then its own arguments. It may run twice with the same effect: a lease is charged when
it is made, and settled when it is removed.
"""

from __future__ import annotations

REDIS_CLOCK = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
"""

BUCKETS = """
local MINUTE = 60000000
local prefix = ARGV[1]
local function key(name, tenant) return prefix .. ':' .. name .. ':' .. tenant end
-- Rounded down, so that a whole minute's worth takes no more than a minute.
local function share(cost, limit) return math.floor(cost * MINUTE / limit) end
local function full_at(name, tenant) return math.max(tonumber(redis.call('GET', key(name, tenant)) or 0), now) end
local function fill(name, tenant, at)
  if at <= now then redis.call('DEL', key(name, tenant))
  else redis.call('SET', key(name, tenant), string.format('%.0f', at), 'PX', math.ceil((at - now) / 1000)) end
end
local function remaining(limit, at) return math.max(math.floor((MINUTE - (at - now)) * limit / MINUTE), 0) end
local function extend(tenant, lease, lease_us)
  redis.call('ZADD', key('leases', tenant), string.format('%.0f', now + lease_us), lease)
  redis.call('PEXPIRE', key('leases', tenant), math.ceil(lease_us / 500))
end
"""


def admit_script(clock: str = REDIS_CLOCK) -> str:
    """tenant, lease id, lease microseconds, max_concurrent, then for requests and for tokens limit per minute and cost
    -> {what is exceeded or '', microseconds to wait, then for requests and for tokens what remains and microseconds
    until all of it is there}. All is charged, or nothing."""
    return f"""{clock}{BUCKETS}
local tenant, lease, lease_us, max_concurrent = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local leases = key('leases', tenant)
redis.call('ZREMRANGEBYSCORE', leases, '-inf', string.format('%.0f', now))
local is_repeated = redis.call('ZSCORE', leases, lease)
local exceeded, wait = '', 0
if max_concurrent > 0 and not is_repeated and redis.call('ZCARD', leases) >= max_concurrent then
  exceeded, wait = 'concurrency', 1000000
end
local buckets = {{{{name = 'requests', limit = tonumber(ARGV[6]), cost = tonumber(ARGV[7])}},
                 {{name = 'tokens', limit = tonumber(ARGV[8]), cost = tonumber(ARGV[9])}}}}
for _, bucket in ipairs(buckets) do
  if bucket.limit > 0 then
    bucket.at = full_at(bucket.name, tenant)
    -- What asks for more than a bucket holds is let in when the bucket is full.
    bucket.next = bucket.at + share(math.min(bucket.cost, bucket.limit), bucket.limit)
    local over = bucket.next - now - MINUTE
    if not is_repeated and over > wait then exceeded, wait = bucket.name, over end
  end
end
if exceeded == '' and not is_repeated then
  extend(tenant, lease, lease_us)
  for _, bucket in ipairs(buckets) do
    if bucket.limit > 0 then
      bucket.at = bucket.next
      fill(bucket.name, tenant, bucket.at)
    end
  end
end
local answer = {{exceeded, wait}}
for _, bucket in ipairs(buckets) do
  answer[#answer + 1] = bucket.limit > 0 and remaining(bucket.limit, bucket.at) or 0
  answer[#answer + 1] = bucket.limit > 0 and bucket.at - now or 0
end
return answer
"""


def settle_script(clock: str = REDIS_CLOCK) -> str:
    """tenant, lease id, then for requests and for tokens limit per minute, how many were charged, how many used: ends a
    generation."""
    return f"""{clock}{BUCKETS}
local tenant, lease = ARGV[2], ARGV[3]
if redis.call('ZREM', key('leases', tenant), lease) == 0 then return 0 end
local function settle(name, limit, charged, used)
  if limit == 0 then return end
  fill(name, tenant, full_at(name, tenant) - share(math.min(charged, limit), limit) + share(used, limit))
end
settle('requests', tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]))
settle('tokens', tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]))
return 1
"""


def renew_script(clock: str = REDIS_CLOCK) -> str:
    """lease microseconds, then tenants and lease ids in turn: they run on, also in a Redis that lost them."""
    return f"""{clock}{BUCKETS}
for i = 3, #ARGV, 2 do extend(ARGV[i], ARGV[i + 1], tonumber(ARGV[2])) end
return (#ARGV - 2) / 2
"""
