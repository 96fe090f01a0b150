-- From now on an operation only goes forward, unless it was asked to stop before. Repeating it is harmless.
-- KEYS: 1 operation   ARGV: 1 step, 2 fence
-- Returns 'ok' | 'cancel' | 'refused' | 'gone'
local answer = whose_turn(KEYS[1], ARGV[1], ARGV[2])
if answer ~= 'ok' then return answer end
if is_cancelled(KEYS[1]) then return 'cancel' end
redis.call('HSET', KEYS[1], 'irrevocable', '1')
return 'ok'
