-- What several scripts need; put before each of them.
local ENDED = { succeeded = 1, failed = 1, cancelled = 1, rejected = 1, stuck = 1 }

-- Seconds after a record was put back by an executor in which its siblings have renewed their leases; see advance.py.
local RENEWED = 3

local function seconds()
  local now = redis.call('TIME')
  return tonumber(now[1]) + tonumber(now[2]) / 1e6
end

-- Added to the time of a look at an operation that nobody has begun with; see keys.py.
local NOT_BEGUN = 1e10

-- The score in ATTENTION of an operation in that state that is to be looked at then.
local function in_turn(state, at)
  return (state == 'queued' or state == 'waiting') and at + NOT_BEGUN or at
end

-- Whether the execution of a step with that fence may still put something down: 'ok' | 'refused' | 'gone'.
local function whose_turn(operation, step, fence)
  local state = redis.call('HGET', operation, 'state')
  if not state then return 'gone' end
  local field = 'step:' .. step .. ':'
  local known = tonumber(redis.call('HGET', operation, field .. 'fence') or '0')
  if known < tonumber(fence) then return 'gone' end -- see renew.lua
  if known > tonumber(fence) or ENDED[state] then return 'refused' end
  return redis.call('HGET', operation, field .. 'state') == 'running' and 'ok' or 'refused'
end

-- Whether the operation is to stop. One that cannot be taken back goes on, whoever asked (an earlier version may have).
local function is_cancelled(operation)
  return redis.call('HEXISTS', operation, 'cancel') == 1 and redis.call('HEXISTS', operation, 'irrevocable') == 0
end

-- Id of the operation that owns an instance: the one that its claim names, as long as that lives; else nil.
local function owner_of(claim, prefix)
  local owner = redis.call('GET', claim)
  local state = owner and redis.call('HGET', prefix .. owner, 'state')
  return state and not ENDED[state] and owner or nil
end

-- Give an instance that is free to the first operation that waits for it and lives: its id, or ''.
local function pass_on(claim, waiting, attention, prefix)
  local heir = redis.call('LPOP', waiting)
  while heir do
    local state = redis.call('HGET', prefix .. heir, 'state')
    if state and not ENDED[state] then
      redis.call('SET', claim, heir)
      if state == 'waiting' then redis.call('HSET', prefix .. heir, 'state', 'queued') end
      -- What was published for it before was declined: it goes out again at once.
      for _, field in ipairs(redis.call('HKEYS', prefix .. heir)) do
        if string.match(field, ':publi%a+$') then redis.call('HDEL', prefix .. heir, field) end
      end
      redis.call('ZADD', attention, seconds(), heir)
      return heir
    end
    heir = redis.call('LPOP', waiting)
  end
  return ''
end

-- Claim an instance for an operation in progress that Redis had lost: before what came since and has not begun.
local function reclaim(claim, waiting, prefix, id)
  local owner = owner_of(claim, prefix)
  if owner and owner ~= id then
    if redis.call('HGET', prefix .. owner, 'state') ~= 'queued' then return end -- it has begun; acquire.lua sees to it
    redis.call('HSET', prefix .. owner, 'state', 'waiting', 'waited', '1')
    redis.call('LPUSH', waiting, owner)
  end
  redis.call('SET', claim, id)
end

-- Hand out only fences above this one from now on.
local function outgrow(key, fence)
  if tonumber(redis.call('GET', key) or '0') < tonumber(fence) then redis.call('SET', key, fence) end
end

-- Whether nothing is known of an operation. Who asked again meanwhile may have been turned away at admission: that
-- record has no plan, and stands for nothing.
local function is_lost(operation) return redis.call('HEXISTS', operation, 'plan') == 0 end

-- Fields from a list of names and values that begins there.
local function fields_from(list, first)
  local fields = {}
  for i = first, #list, 2 do fields[list[i]] = list[i + 1] end
  fields.held = nil
  return fields
end

-- Write down a copy of a record that is lost.
local function put_back(operation, undo, entries, fields)
  redis.call('DEL', operation, undo)
  for name, value in pairs(fields) do redis.call('HSET', operation, name, value) end
  for _, entry in ipairs(entries) do redis.call('RPUSH', undo, entry) end
end

-- Add to a record what another copy of it knows later: undo entries, executions with a higher fence or that have ended
-- since, its turning back. Returns whether there was such a thing.
local function learn(operation, undo, entries, fields)
  local learnt = false
  local place = {} -- an entry's number may be another one here
  for i, entry in ipairs(entries) do
    local at = redis.call('LPOS', undo, entry)
    if not at then
      at = redis.call('RPUSH', undo, entry) - 1
      learnt = true
    end
    place['undo:' .. (i - 1)] = 'undo:' .. at
  end
  local function own(step, name) return 'step:' .. (place[step] or step) .. ':' .. name end

  local later = {}
  for name, fence in pairs(fields) do
    local step = string.match(name, '^step:(.+):fence$')
    if step then
      local known = tonumber(redis.call('HGET', operation, own(step, 'fence')) or '0')
      local ended = fields['step:' .. step .. ':state'] ~= 'running'
        and redis.call('HGET', operation, own(step, 'state')) == 'running'
      later[step] = known < tonumber(fence) or (known == tonumber(fence) and ended)
      learnt = learnt or later[step]
    end
  end
  for name, value in pairs(fields) do
    local step, of_step = string.match(name, '^step:(.+):([^:]+)$')
    if later[step or ''] then redis.call('HSET', operation, own(step, of_step), value) end
  end

  local state = redis.call('HGET', operation, 'state')
  if fields.state == 'undoing' and (state == 'waiting' or state == 'queued' or state == 'running') then
    for _, name in ipairs({ 'state', 'verdict', 'error' }) do
      if fields[name] then redis.call('HSET', operation, name, fields[name]) end
    end
    learnt = true
  elseif fields.state == 'running' and (state == 'waiting' or state == 'queued') then
    redis.call('HSET', operation, 'state', 'running')
  end
  for _, name in ipairs({ 'cancel', 'irrevocable', 'started_at' }) do
    if fields[name] then redis.call('HSETNX', operation, name, fields[name]) end
  end
  if redis.call('HEXISTS', operation, 'irrevocable') == 1 then redis.call('HDEL', operation, 'cancel') end
  return learnt
end
