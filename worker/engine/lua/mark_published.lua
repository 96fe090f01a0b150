-- Remember that messages for steps went out, unless a worker has begun with one of them already.
-- KEYS: 1 operation   ARGV: step, its attempt when it was published, ...
if redis.call('EXISTS', KEYS[1]) == 0 then return end
local now = string.format('%.6f', seconds())
for i = 1, #ARGV, 2 do
  local field = 'step:' .. ARGV[i] .. ':'
  if (redis.call('HGET', KEYS[1], field .. 'attempt') or '0') == ARGV[i + 1] then
    redis.call('HSET', KEYS[1], field .. 'published', now)
    redis.call('HINCRBY', KEYS[1], field .. 'publications', 1)
  end
end
