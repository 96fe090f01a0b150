-- End an operation: free its instance, hand the claim to whoever waits for it, let the record expire.
-- KEYS: 1 operation, 2 claim, 3 waiting, 4 ATTENTION, 5 progress, 6 undo, 7 waiters
-- ARGV: 1 id, 2 final state, 3 seconds to keep the record (0: for ever), 4 key prefix of operations
-- Returns {'1' when this call ended it, id of the operation that has the claim next or ''}
local now = redis.call('TIME')
now = tonumber(now[1]) + tonumber(now[2]) / 1e6
local ended = { succeeded = 1, failed = 1, cancelled = 1, rejected = 1, stuck = 1 }
local state = redis.call('HGET', KEYS[1], 'state')
if not state or ended[state] then return { '', '' } end

redis.call('HSET', KEYS[1], 'state', ARGV[2], 'ended_at', string.format('%.6f', now))
if ARGV[2] ~= 'stuck' then redis.call('HDEL', KEYS[1], 'verdict') end -- a stuck one may be undone yet
redis.call('DEL', KEYS[5])
redis.call('LREM', KEYS[3], 0, ARGV[1])
if redis.call('EXISTS', KEYS[7]) == 0 then redis.call('ZREM', KEYS[4], ARGV[1]) end
if tonumber(ARGV[3]) > 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  redis.call('EXPIRE', KEYS[6], ARGV[3])
end
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return { '1', '' } end

redis.call('DEL', KEYS[2])
local heir = redis.call('LPOP', KEYS[3])
while heir do
  if redis.call('HGET', ARGV[4] .. heir, 'state') == 'waiting' then
    redis.call('SET', KEYS[2], heir)
    redis.call('HSET', ARGV[4] .. heir, 'state', 'queued')
    redis.call('ZADD', KEYS[4], now, heir)
    return { '1', heir }
  end
  heir = redis.call('LPOP', KEYS[3])
end
return { '1', '' }
