-- Put down how a step ended, unless a newer executor has taken over. Repeating it is harmless.
-- KEYS: 1 operation, 2 lease, 3 ATTENTION, 4 COUNTERS
-- ARGV: 1 id, 2 step, 3 token, 4 fence, 5 outcome (done | retry | failed), 6 seconds until the reaper looks,
--       7 verdict ('' or the state the operation ends in once it is undone), 8.. field, value of the step
-- Returns 'ok' | 'refused' | 'gone'
local now = seconds()
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'gone' end
local field = 'step:' .. ARGV[2] .. ':'
local fence = tonumber(redis.call('HGET', KEYS[1], field .. 'fence') or '0')
if fence < tonumber(ARGV[4]) then return 'gone' end -- see renew.lua
if fence > tonumber(ARGV[4]) then return 'refused' end
local step = redis.call('HGET', KEYS[1], field .. 'state')
if step == ARGV[5] then return 'ok' end -- the first answer was lost on its way
if step ~= 'running' or ENDED[state] then return 'refused' end

redis.call('HSET', KEYS[1], field .. 'state', ARGV[5])
redis.call('HINCRBY', KEYS[4], 'step:' .. string.match(ARGV[2], '^[^.:]+') .. ':' .. ARGV[5], 1)
for i = 8, #ARGV, 2 do redis.call('HSET', KEYS[1], field .. ARGV[i], ARGV[i + 1]) end
if ARGV[5] == 'retry' then
  redis.call('HSET', KEYS[1], field .. 'due', string.format('%.6f', now + tonumber(ARGV[6])))
else
  redis.call('HSET', KEYS[1], field .. 'ended_at', string.format('%.6f', now))
end
if ARGV[7] ~= '' and state ~= 'undoing' then
  redis.call('HSET', KEYS[1], 'state', 'undoing', 'verdict', ARGV[7])
  for i = 8, #ARGV, 2 do
    if ARGV[i] == 'error' then redis.call('HSET', KEYS[1], 'error', ARGV[i + 1]) end
  end
end
if redis.call('GET', KEYS[2]) == ARGV[3] then redis.call('DEL', KEYS[2]) end
-- A cancel does not wait until the step would be tried again.
local cancelled = is_cancelled(KEYS[1]) and string.sub(ARGV[2], 1, 5) ~= 'undo:'
redis.call('ZADD', KEYS[3], cancelled and now or now + tonumber(ARGV[6]), ARGV[1])
return 'ok'
