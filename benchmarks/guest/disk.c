/* Reads /dev/vda past the page cache: 128 MiB in order, then 4 KiB blocks here and there; then writes 64 MiB. */
#define _GNU_SOURCE
#include "bench.h"
#include <fcntl.h>
#include <unistd.h>

#define BLOCK (1L << 20)
#define BLOCKS 128
#define SMALL 4096
#define SMALLS 4000

static int fd;
static unsigned char *buffer;

static unsigned long long in_order(void)
{
    unsigned long long sum = 0;
    for (long i = 0; i < BLOCKS; i++) {
        if (pread(fd, buffer, BLOCK, i * BLOCK) != BLOCK)
            fail("pread");
        sum += buffer[i];
    }
    return sum;
}

static unsigned long long here_and_there(void)
{
    unsigned long long state = 88172645463325252ULL, sum = 0;
    for (int i = 0; i < SMALLS; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if (pread(fd, buffer, SMALL, (long)(state % (BLOCKS * BLOCK / SMALL)) * SMALL) != SMALL)
            fail("pread");
        sum += buffer[0];
    }
    return sum;
}

static unsigned long long write_in_order(void)
{
    for (long i = 0; i < 64; i++)
        if (pwrite(fd, buffer, BLOCK, i * BLOCK) != BLOCK)
            fail("pwrite");
    fsync(fd);
    return 64;
}

int main(void)
{
    fd = open("/dev/vda", O_RDWR | O_DIRECT);
    if (fd < 0 || posix_memalign((void **)&buffer, 4096, BLOCK))
        fail("/dev/vda");
    repeat("disk-read-128M", in_order);
    repeat("disk-read-4000x4K", here_and_there);
    repeat("disk-write-64M", write_in_order);
    return 0;
}
