/* Recursive calls: the 34th Fibonacci number. */
#include "bench.h"

__attribute__((noinline)) static unsigned long long fib(unsigned n)
{
    __asm__ volatile("" : "+r"(n));
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static unsigned long long body(void)
{
    return fib(34);
}

int main(void)
{
    repeat("calls", body);
    return 0;
}
