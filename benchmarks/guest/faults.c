/* First touches of 16,384 fresh pages. */
#include "bench.h"
#include <sys/mman.h>

#define PAGES 16384

static unsigned long long body(void)
{
    unsigned long long sum = 0;
    volatile unsigned char *pages =
        mmap(NULL, PAGES * 4096L, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        fail("mmap");
    /* Small pages on every machine, whatever the kernel is set to. */
    madvise((void *)pages, PAGES * 4096L, MADV_NOHUGEPAGE);
    for (long i = 0; i < PAGES; i++) {
        pages[i * 4096] = 1;
        sum += pages[i * 4096];
    }
    munmap((void *)pages, PAGES * 4096L);
    return sum;
}

int main(void)
{
    repeat("faults", body);
    return 0;
}
