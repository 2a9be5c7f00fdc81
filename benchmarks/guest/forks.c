/* 200 times fork, exit and wait. */
#include "bench.h"
#include <sys/wait.h>
#include <unistd.h>

static unsigned long long body(void)
{
    unsigned long long ended = 0;
    for (int i = 0; i < 200; i++) {
        int status = 0;
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child == 0)
            _exit(7);
        if (waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7)
            ended++;
    }
    return ended;
}

int main(void)
{
    repeat("forks", body);
    return 0;
}
