/* Pointer chase: each load's address is the one before's value, over 8 MiB in random order. */
#include "bench.h"

#define COUNT (1 << 20)
#define STEPS 4000000

static unsigned long long next[COUNT];

static unsigned long long body(void)
{
    unsigned long long at = 0;
    for (long i = 0; i < STEPS; i++)
        at = next[at];
    return at;
}

int main(void)
{
    unsigned long long state = 88172645463325252ULL;
    for (unsigned long long i = 0; i < COUNT; i++)
        next[i] = i;
    /* Sattolo's shuffle makes one cycle. */
    for (unsigned long long i = COUNT - 1; i > 0; i--) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        unsigned long long other = state % i, swapped = next[i];
        next[i] = next[other];
        next[other] = swapped;
    }
    repeat("chase", body);
    return 0;
}
