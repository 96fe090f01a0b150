-- Free an instance whose owner has ended or is gone; whoever waits for it has it next.
-- KEYS: 1 claim, 2 waiting, 3 ATTENTION   ARGV: 1 key prefix of operations
-- Returns id of the operation that has the claim now, '' when none has
local owner = owner_of(KEYS[1], ARGV[1])
if owner then return owner end
redis.call('DEL', KEYS[1])
return pass_on(KEYS[1], KEYS[2], KEYS[3], ARGV[1])
