/* 100,000 system calls that do next to nothing. */
#include "bench.h"
#include <sys/syscall.h>
#include <unistd.h>

static unsigned long long body(void)
{
    unsigned long long good = 0;
    for (int i = 0; i < 100000; i++)
        good += syscall(SYS_getppid) >= 0;
    return good;
}

int main(void)
{
    repeat("syscalls", body);
    return 0;
}
