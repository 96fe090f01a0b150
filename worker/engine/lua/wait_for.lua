-- Let a Celery task's result be the final record of an operation.
-- KEYS: 1 operation, 2 waiters   ARGV: 1 task id and worker
-- Returns '1' when it will be told, '' when the operation has ended already
local state = redis.call('HGET', KEYS[1], 'state')
if not state or ENDED[state] then return '' end
if not redis.call('LPOS', KEYS[2], ARGV[1]) then redis.call('RPUSH', KEYS[2], ARGV[1]) end
return '1'
