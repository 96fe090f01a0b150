-- Put down how to undo what a step is about to do; a step that starts over adds nothing twice.
-- KEYS: 1 operation, 2 undo   ARGV: 1 step, 2 fence, 3 entry
-- Returns 'ok' | 'refused' | 'gone'
if redis.call('EXISTS', KEYS[1]) == 0 then return 'gone' end
if redis.call('HGET', KEYS[1], 'step:' .. ARGV[1] .. ':fence') ~= ARGV[2] then return 'refused' end
if not redis.call('LPOS', KEYS[2], ARGV[3]) then redis.call('RPUSH', KEYS[2], ARGV[3]) end
return 'ok'
