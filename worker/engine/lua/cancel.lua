-- Ask an operation to stop, unless it can only go forward any more.
-- KEYS: 1 operation, 2 ATTENTION, 3 unwanted
-- ARGV: 1 id, 2 '1' to give it up even so, 3 seconds in which it is not to begin where nothing is known of it
-- Returns the state it was in when asked, '' when there is none
local state = redis.call('HGET', KEYS[1], 'state')
if not state then
  if tonumber(ARGV[3]) > 0 then redis.call('SET', KEYS[3], '1', 'EX', ARGV[3]) end
  return ''
end
if ARGV[2] == '1' then redis.call('HDEL', KEYS[1], 'irrevocable') end
local may_stop = redis.call('HEXISTS', KEYS[1], 'irrevocable') == 0
if may_stop and (state == 'queued' or state == 'running' or state == 'waiting') then
  local now = string.format('%.6f', seconds())
  redis.call('HSETNX', KEYS[1], 'cancel', now)
  redis.call('ZADD', KEYS[2], now, ARGV[1])
end
return state
