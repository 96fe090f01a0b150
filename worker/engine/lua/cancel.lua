-- Ask an operation to stop. KEYS: 1 operation, 2 ATTENTION   ARGV: 1 id
-- Returns the state it was in when asked, '' when there is none
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return '' end
if state == 'queued' or state == 'running' or state == 'waiting' then
  local now = string.format('%.6f', seconds())
  redis.call('HSETNX', KEYS[1], 'cancel', now)
  redis.call('ZADD', KEYS[2], now, ARGV[1])
end
return state
