/* What the guests' programs share: a clock, and the line that says how long something took. */
#ifndef BENCH_H
#define BENCH_H

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define REPEATS 5

static inline long long now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* `@ name nanoseconds check`: the check is what was computed, the same on every machine. */
static inline void report(const char *name, long long ns, unsigned long long check)
{
    printf("@ %s %lld %llu\n", name, ns, check);
    fflush(stdout);
}

static inline void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* Runs `body`, which returns its check, several times. */
static inline void repeat(const char *name, unsigned long long (*body)(void))
{
    for (int i = 0; i < REPEATS; i++) {
        long long start = now_ns();
        unsigned long long check = body();
        report(name, now_ns() - start, check);
    }
}

#endif
