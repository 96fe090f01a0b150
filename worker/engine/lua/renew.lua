-- Keep a lease. A lease that expired while nobody took the step over (Redis was away) is taken back.
-- KEYS: 1 operation, 2 lease, 3 stopping   ARGV: 1 step, 2 token, 3 fence, 4 time to live in ms
-- Returns {'held' | 'stop' | 'leave' | 'lost' | 'gone', '1' when a cancel was asked for}
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return { 'gone', '' } end
local field = 'step:' .. ARGV[1] .. ':'
local cancel = is_cancelled(KEYS[1]) and '1' or ''
local holder = redis.call('GET', KEYS[2])
local fence = tonumber(redis.call('HGET', KEYS[1], field .. 'fence') or '0')
-- Fences only grow: one that is lower than ours was put back by a sibling that had not heard of us.
if fence < tonumber(ARGV[3]) then return { 'gone', cancel } end
if fence > tonumber(ARGV[3]) or ENDED[state] then return { 'lost', cancel } end
if redis.call('HGET', KEYS[1], field .. 'state') ~= 'running' then return { 'lost', cancel } end
if holder and holder ~= ARGV[2] then return { 'lost', cancel } end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[4])
-- A sibling in the same group failed: what this step does will be undone anyway.
if state == 'undoing' and string.sub(ARGV[1], 1, 5) ~= 'undo:' then return { 'stop', cancel } end
local leave_at = tonumber(redis.call('GET', KEYS[3]) or 'inf')
if tonumber(redis.call('TIME')[1]) >= leave_at then return { 'leave', cancel } end
return { 'held', cancel }
