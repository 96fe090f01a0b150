-- Put down how to undo what a step is about to do; a step that starts over adds nothing twice.
-- KEYS: 1 operation, 2 undo   ARGV: 1 step, 2 fence, 3 entry
-- Returns 'ok' | 'refused' | 'gone'
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'gone' end
local field = 'step:' .. ARGV[1] .. ':'
local fence = tonumber(redis.call('HGET', KEYS[1], field .. 'fence') or '0')
if fence < tonumber(ARGV[2]) then return 'gone' end -- see renew.lua
if fence > tonumber(ARGV[2]) or ENDED[state] then return 'refused' end
if redis.call('HGET', KEYS[1], field .. 'state') ~= 'running' then return 'refused' end
if not redis.call('LPOS', KEYS[2], ARGV[3]) then redis.call('RPUSH', KEYS[2], ARGV[3]) end
return 'ok'
