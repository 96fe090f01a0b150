-- What several scripts need; put before each of them.
local ENDED = { succeeded = 1, failed = 1, cancelled = 1, rejected = 1, stuck = 1 }

local function seconds()
  local now = redis.call('TIME')
  return tonumber(now[1]) + tonumber(now[2]) / 1e6
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
    redis.call('HSET', prefix .. owner, 'state', 'waiting')
    redis.call('LPUSH', waiting, owner)
  end
  redis.call('SET', claim, id)
end

-- Hand out only fences above this one from now on.
local function outgrow(key, fence)
  if tonumber(redis.call('GET', key) or '0') < tonumber(fence) then redis.call('SET', key, fence) end
end
