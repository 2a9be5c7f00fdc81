/* Gives eth0 an address and brings it up: link ADDRESS. The prefix has 24 bits. */
#include "bench.h"
#include <arpa/inet.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void set(int fd, unsigned long request, struct ifreq *ask, const char *address)
{
    struct sockaddr_in *in = (struct sockaddr_in *)&ask->ifr_addr;
    memset(in, 0, sizeof *in);
    in->sin_family = AF_INET;
    inet_pton(AF_INET, address, &in->sin_addr);
    if (ioctl(fd, request, ask))
        fail(address);
}

int main(int argc, char **argv)
{
    struct ifreq ask = {.ifr_name = "eth0"};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (argc != 2)
        return 2;
    set(fd, SIOCSIFADDR, &ask, argv[1]);
    set(fd, SIOCSIFNETMASK, &ask, "255.255.255.0");
    ask.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &ask))
        fail("eth0");
    sleep(1);
    return 0;
}
