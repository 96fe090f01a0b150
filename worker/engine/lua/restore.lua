-- Put a record back that Redis has lost, from the memory of the worker that executes one of its steps, and with it
-- that worker's lease: before it could renew, the reaper would hand the step to another one. Where a sibling was
-- faster, only what it did not know is added.
-- KEYS: 1 operation, 2 claim, 3 undo, 4 ATTENTION, 5 OPERATIONS, 6 FENCE, 7 lease, 8 waiting
-- ARGV: 1 id, 2 step, 3 token, 4 fence, 5 time to live in ms, 6 submitted_at, 7 key prefix of operations,
--       8 number of undo entries, entries.., field, value, ...
-- Returns '1' when something was put back
local field = 'step:' .. ARGV[2] .. ':'
local lost = redis.call('EXISTS', KEYS[1]) == 0
local fence = tonumber(redis.call('HGET', KEYS[1], field .. 'fence') or '0')
if not lost and fence >= tonumber(ARGV[4]) then return '' end

local entries = tonumber(ARGV[8])
for i = 9 + entries, #ARGV, 2 do
  if lost or string.sub(ARGV[i], 1, #field) == field then redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
if lost then redis.call('DEL', KEYS[3]) end
for i = 9, 8 + entries do
  if not redis.call('LPOS', KEYS[3], ARGV[i]) then redis.call('RPUSH', KEYS[3], ARGV[i]) end
end
redis.call('SET', KEYS[7], ARGV[3], 'PX', ARGV[5])
reclaim(KEYS[2], KEYS[8], ARGV[7], ARGV[1])
redis.call('ZADD', KEYS[4], redis.call('TIME')[1] + tonumber(ARGV[5]) / 1000, ARGV[1])
redis.call('ZADD', KEYS[5], ARGV[6], ARGV[1])
outgrow(KEYS[6], ARGV[4])
return '1'
