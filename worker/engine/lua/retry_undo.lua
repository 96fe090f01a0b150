-- Let an operation whose undo failed try again: it owns its instance once more, and what failed may run once more.
-- KEYS: 1 operation, 2 claim, 3 undo, 4 ATTENTION, 5 STUCK   ARGV: 1 id, 2 key prefix of operations
-- Returns {'ok'} | {'state', state it is in instead of stuck} | {'busy', owner} | {'gone'}
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return { 'gone' } end
if state ~= 'stuck' then return { 'state', state } end
local owner = owner_of(KEYS[2], ARGV[2])
if owner and owner ~= ARGV[1] then return { 'busy', owner } end
redis.call('SET', KEYS[2], ARGV[1])
for i = 0, redis.call('LLEN', KEYS[3]) - 1 do
  local field = 'step:undo:' .. i .. ':'
  if redis.call('HGET', KEYS[1], field .. 'state') == 'failed' then
    redis.call('HDEL', KEYS[1], field .. 'state', field .. 'attempt', field .. 'lost', field .. 'locked',
      field .. 'forgiven', field .. 'published', field .. 'publications', field .. 'ended_at')
  end
end
redis.call('HSET', KEYS[1], 'state', 'undoing')
redis.call('HDEL', KEYS[1], 'ended_at')
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('ZADD', KEYS[4], seconds(), ARGV[1])
return { 'ok' }
