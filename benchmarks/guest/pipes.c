/* 10,000 times there and back between two processes over pipes, on one processor. */
#define _GNU_SOURCE
#include "bench.h"
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned long long body(void)
{
    int there[2], back[2];
    char byte = 'x';
    unsigned long long turns = 0;
    if (pipe(there) || pipe(back))
        fail("pipe");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        close(there[1]);
        close(back[0]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1)
                _exit(1);
        _exit(0);
    }
    close(there[0]);
    close(back[1]);
    for (int i = 0; i < 10000; i++)
        turns += write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1;
    close(there[1]);
    close(back[0]);
    waitpid(child, NULL, 0);
    return turns;
}

int main(void)
{
    cpu_set_t first;
    CPU_ZERO(&first);
    CPU_SET(0, &first);
    sched_setaffinity(0, sizeof first, &first);
    repeat("pipes", body);
    return 0;
}
