/* A shared directory by virtio-fs: a big file in order, and many small ones opened, read and closed. */
#include "bench.h"
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILES 1000

static char buffer[1 << 20];

static unsigned long long read_whole(const char *path)
{
    unsigned long long total = 0;
    ssize_t got;
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        fail(path);
    while ((got = read(fd, buffer, sizeof buffer)) > 0)
        total += (unsigned long long)got;
    close(fd);
    return total;
}

static void forget(void)
{
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
    if (fd < 0 || write(fd, "3", 1) != 1)
        fail("drop_caches");
    close(fd);
}

static void timed(const char *name, unsigned long long (*body)(void))
{
    for (int i = 0; i < REPEATS; i++) {
        forget();
        long long start = now_ns();
        unsigned long long check = body();
        report(name, now_ns() - start, check);
    }
}

static unsigned long long big(void)
{
    return read_whole("/mnt/big");
}

static unsigned long long small(void)
{
    char path[64];
    unsigned long long total = 0;
    for (int i = 0; i < FILES; i++) {
        snprintf(path, sizeof path, "/mnt/small/%d", i);
        total += read_whole(path);
    }
    return total;
}

int main(void)
{
    mkdir("/mnt", 0755);
    if (mount("share", "/mnt", "virtiofs", MS_RDONLY, NULL))
        fail("virtiofs");
    timed("share-read-64M", big);
    timed("share-1000-files", small);
    return 0;
}
