-- Take an operation in, or say why not. Atomic: the claim on the instance and the record appear together.
-- KEYS: 1 operation, 2 claim, 3 waiting, 4 ATTENTION, 5 OPERATIONS, 6 waiters, 7 unwanted
-- ARGV: 1 id, 2 digest, 3 seconds until the reaper looks, 4 '1' to wait for a busy instance, 5 key prefix of
--       operations, 6 task id and worker of who wants to be told of the end, or '', 7.. field, value, ...
-- Returns {'admitted', state} | {'exists', digest} | {'busy', owner}
local now = seconds()

local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'rejected' then
  return { 'exists', redis.call('HGET', KEYS[1], 'digest') }
end

local owner = owner_of(KEYS[2], ARGV[5])
state = 'queued'
if owner and owner ~= ARGV[1] then
  if ARGV[4] ~= '1' then return { 'busy', owner } end
  state = 'waiting'
  redis.call('RPUSH', KEYS[3], ARGV[1])
else
  redis.call('SET', KEYS[2], ARGV[1])
end

redis.call('DEL', KEYS[1])
for i = 7, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'digest', ARGV[2], 'state', state, 'submitted_at', string.format('%.6f', now))
if state == 'waiting' then redis.call('HSET', KEYS[1], 'waited', '1') end
-- It was asked to stop before it came.
if redis.call('DEL', KEYS[7]) == 1 then redis.call('HSET', KEYS[1], 'cancel', string.format('%.6f', now)) end
if ARGV[6] ~= '' then redis.call('RPUSH', KEYS[6], ARGV[6]) end
redis.call('ZADD', KEYS[4], in_turn(state, now + tonumber(ARGV[3])), ARGV[1])
redis.call('ZADD', KEYS[5], now, ARGV[1])
return { 'admitted', state }
