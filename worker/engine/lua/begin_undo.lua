-- Turn an operation back: from now on its steps are refused and its undo entries may run.
-- KEYS: 1 operation, 2 ATTENTION   ARGV: 1 id, 2 verdict, 3 error (JSON)
-- Returns the state the operation is in afterwards, '' when there is none
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return '' end
if state == 'queued' or state == 'running' or state == 'waiting' then
  redis.call('HSET', KEYS[1], 'state', 'undoing', 'verdict', ARGV[2], 'error', ARGV[3])
  redis.call('ZADD', KEYS[2], seconds(), ARGV[1])
  return 'undoing'
end
return state
