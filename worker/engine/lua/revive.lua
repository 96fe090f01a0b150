-- Put a record back that Redis has lost, from a host's copy. Nobody executes it. It is held until every host that may
-- have a later copy has had time to add what that knows; then the reaper sees to what is next.
-- KEYS: 1 operation, 2 claim, 3 undo, 4 ATTENTION, 5 OPERATIONS, 6 FENCE, 7 waiting, 8 HELD
-- ARGV: 1 id, 2 highest fence it knew, 3 submitted_at, 4 key prefix of operations,
--       5 number of undo entries, entries.., field, value, ...
-- Returns 'put back' | 'completed' where the copy knew something later | ''
local count = tonumber(ARGV[5])
local entries = {}
for i = 6, 5 + count do entries[#entries + 1] = ARGV[i] end
local fields = fields_from(ARGV, 6 + count)

local done = 'completed'
if is_lost(KEYS[1]) then
  put_back(KEYS[1], KEYS[3], entries, fields)
  redis.call('HSET', KEYS[1], 'held', string.format('%.6f', seconds()))
  redis.call('SADD', KEYS[8], ARGV[1])
  done = 'put back'
elseif redis.call('HEXISTS', KEYS[1], 'held') == 0 or not learn(KEYS[1], KEYS[3], entries, fields) then
  return ''
end
reclaim(KEYS[2], KEYS[7], ARGV[4], ARGV[1])
redis.call('ZADD', KEYS[4], seconds(), ARGV[1])
redis.call('ZADD', KEYS[5], ARGV[3], ARGV[1])
outgrow(KEYS[6], ARGV[2])
return done
