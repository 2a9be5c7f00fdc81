/* Counts the primes below four million. */
#include "bench.h"
#include <string.h>

#define LIMIT 4000000

static unsigned char composite[LIMIT];

static unsigned long long body(void)
{
    unsigned long long primes = 0;
    memset(composite, 0, sizeof composite);
    for (long i = 2; i < LIMIT; i++) {
        if (composite[i])
            continue;
        primes++;
        for (long j = i * i; j < LIMIT; j += i)
            composite[j] = 1;
    }
    return primes;
}

int main(void)
{
    repeat("sieve", body);
    return 0;
}
