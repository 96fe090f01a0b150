-- Remove a lease of a step that nobody executes.
-- KEYS: 1 operation, 2 lease   ARGV: 1 step
-- Returns '1' when it is gone, '' when the step runs
if redis.call('HGET', KEYS[1], 'step:' .. ARGV[1] .. ':state') == 'running' then
  if not ENDED[redis.call('HGET', KEYS[1], 'state')] then return '' end
end
redis.call('DEL', KEYS[2])
return '1'
