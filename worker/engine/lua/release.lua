-- Free an instance whose owner has ended or is gone; whoever waits for it has it next.
-- KEYS: 1 claim, 2 waiting, 3 ATTENTION   ARGV: 1 key prefix of operations
-- Returns id of the operation that has the claim now, '' when none has
local ended = { succeeded = 1, failed = 1, cancelled = 1, rejected = 1, stuck = 1 }
local owner = redis.call('GET', KEYS[1])
if owner then
  local state = redis.call('HGET', ARGV[1] .. owner, 'state')
  if state and not ended[state] then return owner end
  redis.call('DEL', KEYS[1])
end

local heir = redis.call('LPOP', KEYS[2])
while heir do
  if redis.call('HGET', ARGV[1] .. heir, 'state') == 'waiting' then
    redis.call('SET', KEYS[1], heir)
    redis.call('HSET', ARGV[1] .. heir, 'state', 'queued')
    redis.call('ZADD', KEYS[3], redis.call('TIME')[1], heir)
    return heir
  end
  heir = redis.call('LPOP', KEYS[2])
end
return ''
