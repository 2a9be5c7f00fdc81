/* Does nothing, for long. */
#include "bench.h"
#include <unistd.h>

int main(void)
{
    report("idle", now_ns(), 0);
    sleep(600);
    return 0;
}
