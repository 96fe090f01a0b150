-- Keep a lease. A lease that expired while nobody took the step over (Redis was away) is taken back.
-- KEYS: 1 operation, 2 lease   ARGV: 1 step, 2 token, 3 fence, 4 time to live in ms
-- Returns {'held' | 'stop' | 'lost' | 'gone', '1' when a cancel was asked for}
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return { 'gone', '' } end
local field = 'step:' .. ARGV[1] .. ':'
local cancel = redis.call('HEXISTS', KEYS[1], 'cancel') == 1 and '1' or ''
local holder = redis.call('GET', KEYS[2])
if redis.call('HGET', KEYS[1], field .. 'fence') ~= ARGV[3] then return { 'lost', cancel } end
if redis.call('HGET', KEYS[1], field .. 'state') ~= 'running' then return { 'lost', cancel } end
if holder and holder ~= ARGV[2] then return { 'lost', cancel } end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[4])
-- A sibling in the same group failed: what this step does will be undone anyway.
if state == 'undoing' and string.sub(ARGV[1], 1, 5) ~= 'undo:' then return { 'stop', cancel } end
return { 'held', cancel }
