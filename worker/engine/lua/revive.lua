-- Put a record back that Redis has lost, from a host's copy. Nobody executes it: the reaper sees to what is next.
-- KEYS: 1 operation, 2 claim, 3 undo, 4 ATTENTION, 5 OPERATIONS, 6 FENCE, 7 waiting
-- ARGV: 1 id, 2 highest fence it knew, 3 submitted_at, 4 key prefix of operations,
--       5 number of undo entries, entries.., field, value, ...
-- Returns '1' when it was put back
-- Somebody who asked again in the meantime may have been turned away at admission: that record has no plan, and stands
-- for nothing.
if redis.call('HEXISTS', KEYS[1], 'plan') == 1 then return '' end
redis.call('DEL', KEYS[1])
local entries = tonumber(ARGV[5])
for i = 6 + entries, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('DEL', KEYS[3])
for i = 6, 5 + entries do redis.call('RPUSH', KEYS[3], ARGV[i]) end
reclaim(KEYS[2], KEYS[7], ARGV[4], ARGV[1])
redis.call('ZADD', KEYS[4], redis.call('TIME')[1], ARGV[1])
redis.call('ZADD', KEYS[5], ARGV[3], ARGV[1])
outgrow(KEYS[6], ARGV[2])
return '1'
