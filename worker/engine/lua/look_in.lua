-- Have the reaper look at an operation later, unless somebody has asked for it sooner; what was asked for before the
-- record was read is done with.
-- KEYS: 1 operation, 2 ATTENTION   ARGV: 1 id, 2 seconds, 3 when the record was read
local asked = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not asked then return end
asked = tonumber(asked) % NOT_BEGUN
local at = seconds() + tonumber(ARGV[2])
if asked <= tonumber(ARGV[3]) or asked > at then
  redis.call('ZADD', KEYS[2], in_turn(redis.call('HGET', KEYS[1], 'state'), at), ARGV[1])
end
