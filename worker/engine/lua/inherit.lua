-- Have the step of a dead worker tried again now, by whoever is up.
-- KEYS: 1 operation, 2 lease, 3 ATTENTION
-- ARGV: 1 id, 2 step, 3 how tokens of the dead begin, 4 how those of the living one begin, 5 error
-- Returns '1' when it was a dead one's
local holder = redis.call('GET', KEYS[2]) or ''
local function begins_with(prefix) return string.sub(holder, 1, #prefix) == prefix end
local field = 'step:' .. ARGV[2] .. ':'
if not begins_with(ARGV[3]) or begins_with(ARGV[4]) then return '' end
if redis.call('HGET', KEYS[1], field .. 'state') ~= 'running' then return '' end
redis.call('DEL', KEYS[2])
local now = string.format('%.6f', seconds())
redis.call('HSET', KEYS[1], field .. 'state', 'retry', field .. 'due', now, field .. 'error', ARGV[5])
redis.call('HINCRBY', KEYS[1], field .. 'lost', 1)
redis.call('ZADD', KEYS[3], now, ARGV[1])
return '1'
