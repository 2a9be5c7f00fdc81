/* The C library's memcpy of blocks from 64 bytes to 4 MiB. */
#include "bench.h"
#include <string.h>

#define BYTES (4 << 20)

static unsigned char from[BYTES], to[BYTES];

static unsigned long long body(void)
{
    static const long sizes[] = {64, 1024, 65536, BYTES};
    void *(*volatile copy)(void *, const void *, size_t) = memcpy;
    for (int s = 0; s < 4; s++)
        for (int round = 0; round < 16; round++)
            for (long at = 0; at + sizes[s] <= BYTES; at += sizes[s])
                copy(to + at, from + at, (size_t)sizes[s]);
    return to[BYTES - 1];
}

int main(void)
{
    memset(from, 0x5a, sizeof from);
    repeat("copy", body);
    return 0;
}
