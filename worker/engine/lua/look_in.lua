-- Have the reaper look at an operation later, unless somebody has asked for it sooner.
-- KEYS: 1 ATTENTION   ARGV: 1 id, 2 seconds
local asked = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not asked then return end
asked = tonumber(asked)
local now = seconds()
local at = now + tonumber(ARGV[2])
if asked <= now or asked > at then redis.call('ZADD', KEYS[1], at, ARGV[1]) end
