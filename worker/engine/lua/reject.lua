-- Keep the record of a request that was turned away; never over one that was taken in.
-- KEYS: 1 operation, 2 OPERATIONS   ARGV: 1 id, 2 seconds to keep it, 3.. field, value, ...
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'rejected' then return '' end
local now = seconds()
redis.call('DEL', KEYS[1])
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
local stamp = string.format('%.6f', now)
redis.call('HSET', KEYS[1], 'state', 'rejected', 'submitted_at', stamp, 'ended_at', stamp)
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], now, ARGV[1])
return '1'
