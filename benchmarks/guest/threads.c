/* The same work in one thread, then in each of two at once. */
#include "bench.h"
#include <pthread.h>

static void *work(void *seed)
{
    unsigned long long state = *(unsigned long long *)seed;
    for (long i = 0; i < 40000000; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    *(unsigned long long *)seed = state;
    return NULL;
}

static unsigned long long run(int count)
{
    pthread_t threads[2];
    unsigned long long seeds[2] = {88172645463325252ULL, 1181783497276652981ULL};
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, work, &seeds[i]))
            fail("pthread_create");
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    return seeds[0] ^ (count > 1 ? seeds[1] : 0);
}

static unsigned long long one(void)
{
    return run(1);
}

static unsigned long long two(void)
{
    return run(2);
}

int main(void)
{
    repeat("thread-one", one);
    repeat("thread-two", two);
    return 0;
}
