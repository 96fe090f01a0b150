-- Put a record back that Redis has lost, from the memory of the worker that executes one of its steps, and with it
-- that worker's lease: before it could renew, the reaper would hand the step to another one. Where somebody was faster,
-- who had not heard of this step, what is known later here is added. Nothing is held: who executes knows best.
-- KEYS: 1 operation, 2 claim, 3 undo, 4 ATTENTION, 5 OPERATIONS, 6 FENCE, 7 lease, 8 waiting, 9 HELD
-- ARGV: 1 id, 2 step, 3 token, 4 fence, 5 time to live in ms, 6 submitted_at, 7 key prefix of operations,
--       8 number of undo entries, entries.., field, value, ...
-- Returns '1' when something was put back
local lost = is_lost(KEYS[1])
local fence = tonumber(redis.call('HGET', KEYS[1], 'step:' .. ARGV[2] .. ':fence') or '0')
if not lost and fence >= tonumber(ARGV[4]) then return '' end

local count = tonumber(ARGV[8])
local entries = {}
for i = 9, 8 + count do entries[#entries + 1] = ARGV[i] end
local fields = fields_from(ARGV, 9 + count)
if lost then
  put_back(KEYS[1], KEYS[3], entries, fields)
else
  learn(KEYS[1], KEYS[3], entries, fields)
  redis.call('HDEL', KEYS[1], 'held')
  redis.call('SREM', KEYS[9], ARGV[1])
end
redis.call('HSET', KEYS[1], 'restored', string.format('%.6f', seconds())) -- its siblings' leases are lost, too
redis.call('SET', KEYS[7], ARGV[3], 'PX', ARGV[5])
reclaim(KEYS[2], KEYS[8], ARGV[7], ARGV[1])
redis.call('ZADD', KEYS[4], seconds() + tonumber(ARGV[5]) / 1000, ARGV[1])
redis.call('ZADD', KEYS[5], ARGV[6], ARGV[1])
outgrow(KEYS[6], ARGV[4])
return '1'
