-- Hand out only higher fences from now on.   KEYS: 1 FENCE   ARGV: 1 fence
outgrow(KEYS[1], ARGV[1])
