-- Put down how to undo what a step is about to do; a step that starts over adds nothing twice.
-- KEYS: 1 operation, 2 undo   ARGV: 1 step, 2 fence, 3 entry
-- Returns 'ok' | 'refused' | 'gone'
local answer = whose_turn(KEYS[1], ARGV[1], ARGV[2])
if answer ~= 'ok' then return answer end
if not redis.call('LPOS', KEYS[2], ARGV[3]) then redis.call('RPUSH', KEYS[2], ARGV[3]) end
return 'ok'
