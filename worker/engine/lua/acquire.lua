-- Become the one executor of a step, with a fence higher than every earlier one.
-- KEYS: 1 operation, 2 lease, 3 ATTENTION, 4 FENCE, 5 undo, 6 claim, 7 waiting
-- ARGV: 1 id, 2 step, 3 worker, 4 token, 5 time to live in ms, 6 'run' or 'undo', 7 newest form of a record that the
--       worker knows, 8 key prefix of operations
-- Returns {'yours', fence, attempt, fields and values of the record, undo entries} | {'done'} | {'leased'} | {'early'} | {'cancel'} | {'ended'} | {'gone'} |
-- {'newer'} | {'unowned'}
local now = seconds()
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return { 'gone' } end
if redis.call('HEXISTS', KEYS[1], 'held') == 1 then return { 'early' } end
if tonumber(redis.call('HGET', KEYS[1], 'schema') or '1') > tonumber(ARGV[7]) then return { 'newer' } end
local function state_of(key) return redis.call('HGET', KEYS[1], 'step:' .. key .. ':state') end
local field = 'step:' .. ARGV[2] .. ':'
local step = state_of(ARGV[2])

-- Whether all that stands before this step is done: the stages before its own, or the undo entries newer than it.
local function is_its_turn()
  if ARGV[6] == 'undo' then
    for newer = tonumber(string.sub(ARGV[2], 6)) + 1, redis.call('LLEN', KEYS[5]) - 1 do
      if state_of('undo:' .. newer) ~= 'done' then return false end
    end
    return true
  end
  for _, stage in ipairs(cjson.decode(redis.call('HGET', KEYS[1], 'plan'))) do
    local done = true
    for _, planned in ipairs(stage) do
      if planned.key == ARGV[2] then return true end
      done = done and state_of(planned.key) == 'done'
    end
    if not done then return false end
  end
  return false
end

if ARGV[6] == 'undo' then
  if state ~= 'undoing' then return { 'ended' } end
else
  if state == 'waiting' then return { 'early' } end
  if state ~= 'queued' and state ~= 'running' then return { 'ended' } end
end
if step == 'done' then return { 'done' } end
if step == 'failed' then return { 'ended' } end
local holder = redis.call('GET', KEYS[2])
-- With the record of this very instant: should Redis lose it in the next one, the executor still knows it.
local function yours()
  local fence, attempt = redis.call('HGET', KEYS[1], field .. 'fence'), redis.call('HGET', KEYS[1], field .. 'attempt')
  return { 'yours', fence, attempt, redis.call('HGETALL', KEYS[1]), redis.call('LRANGE', KEYS[5], 0, -1) }
end
if holder == ARGV[4] then return yours() end -- the first answer was lost on its way
if holder then return { 'leased' } end
local restored = tonumber(redis.call('HGET', KEYS[1], 'restored') or '0')
if step == 'running' and now - restored < RENEWED then return { 'leased' } end
if ARGV[6] == 'run' and is_cancelled(KEYS[1]) then return { 'cancel' } end
if not is_its_turn() then return { 'early' } end
-- A message that lingered from before a retry was put off must not run ahead of its time.
if step == 'retry' and tonumber(redis.call('HGET', KEYS[1], field .. 'due')) > now + 0.05 then return { 'early' } end

-- A claim that Redis has lost is taken again; one that another took in the meantime is waited for.
local owner = owner_of(KEYS[6], ARGV[8])
if owner and owner ~= ARGV[1] then
  if not redis.call('LPOS', KEYS[7], ARGV[1]) then redis.call('RPUSH', KEYS[7], ARGV[1]) end
  return { 'unowned' }
end
redis.call('SET', KEYS[6], ARGV[1])

local fence = math.max(tonumber(redis.call('GET', KEYS[4]) or '0') + 1, math.floor(now * 1e6))
fence = string.format('%.0f', fence)
redis.call('SET', KEYS[4], fence)
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[5])
redis.call('HINCRBY', KEYS[1], field .. 'attempt', 1)
if step == 'running' then redis.call('HINCRBY', KEYS[1], field .. 'lost', 1) end
local stamp = string.format('%.6f', now)
redis.call('HSETNX', KEYS[1], field .. 'started_at', stamp)
redis.call('HSET', KEYS[1], field .. 'state', 'running', field .. 'fence', fence, field .. 'worker', ARGV[3])
redis.call('HDEL', KEYS[1], field .. 'due', field .. 'published', field .. 'publications')
if state == 'queued' then redis.call('HSET', KEYS[1], 'state', 'running') end
redis.call('HSETNX', KEYS[1], 'started_at', stamp)
redis.call('ZADD', KEYS[3], now + tonumber(ARGV[5]) / 1000, ARGV[1])
return yours()
