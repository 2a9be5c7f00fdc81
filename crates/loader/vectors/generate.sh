#!/bin/sh
# Makes the payload vectors with the tools that the kernel's own build uses (scripts/Makefile.lib),
# and checks each by decompressing it with the same tool. Needs gzip bzip2 xz-utils lzop lz4 zstd.
set -eu
cd "$(dirname "$0")"
plain=$(mktemp)
trap 'rm -f "$plain"' EXIT

# 300,000 bytes that compress well but not trivially, with x86 call instructions for xz's filter.
# The same formula stands in src/tests/compressions.rs.
python3 - > "$plain" <<'PY'
import sys
data = bytearray((i * i >> 9 ^ i >> 3) & 0xFF if i % 4096 < 512 else i >> 12 for i in range(300_000))
for i in range(0, 290_000, 1000):
    data[i:i + 5] = b"\xe8" + (7777 - i & 0xFFFFFFFF).to_bytes(4, "little")
sys.stdout.buffer.write(data)
PY

append_size() { # the kernel build's size_append
    python3 -c 'import os, sys; sys.stdout.buffer.write(os.path.getsize(sys.argv[1]).to_bytes(4, "little"))' "$plain"
}
emit() { # name, compress command, decompress command
    sh -c "$2" < "$plain" > "payload.$1"
    sh -c "$3" < "payload.$1" | cmp - "$plain"
    [ "$1" = gzip ] || append_size >> "payload.$1"
}
emit gzip  'gzip -n -9'                                     'gzip -dc'
emit bzip2 'bzip2 -9'                                       'bzip2 -dc'
emit lzma  'xz --format=lzma -9'                            'xz --format=lzma -dc'
emit xz    'xz --check=crc32 --x86 --lzma2=dict=32MiB'      'xz -dc'
emit lzo   'lzop -9'                                        'lzop -dc'
emit lz4   'lz4 -l -9 - -'                                  'lz4 -dc'
emit zstd  'zstd -22 --ultra --no-progress -q'              'zstd -dc'
