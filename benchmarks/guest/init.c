/*
 * Runs a list of commands and says how long each took. As PID 1 of a guest it brings the guest up first and powers it
 * off afterwards; as `init --native ROOT LIST` it does the same work on the host.
 *
 * A command is a line of words separated by tabs: a name, the program, its arguments. A name of "-" isn't timed.
 */
#define _GNU_SOURCE
#include "bench.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORDS 16

static void load_modules(void)
{
    char line[256], path[300];
    FILE *order = fopen("/modules/order", "r");
    if (!order)
        return;
    while (fgets(line, sizeof line, order)) {
        line[strcspn(line, "\n")] = 0;
        snprintf(path, sizeof path, "/modules/%s", line);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
            perror(path);
        if (fd >= 0)
            close(fd);
    }
    fclose(order);
}

static void mount_at(const char *type, const char *source, const char *target)
{
    mkdir(target, 0755);
    if (mount(source, target, type, 0, NULL) && errno != EBUSY)
        perror(target);
}

static void mount_kernel(const char *root)
{
    static const char *const types[] = {"proc", "sysfs", "devtmpfs", "tmpfs"};
    static const char *const targets[] = {"/proc", "/sys", "/dev", "/tmp"};
    char path[256];
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s%s", root, targets[i]);
        mount_at(types[i], types[i], path);
    }
}

static void enter(const char *root)
{
    if (chdir(root) || chroot(".") || chdir("/"))
        fail(root);
}

static void run(char *line)
{
    char *words[WORDS + 1] = {0};
    int count = 0, status = 0;
    for (char *word = strtok(line, "\t\n"); word && count < WORDS; word = strtok(NULL, "\t\n"))
        words[count++] = word;
    if (count < 2)
        return;
    long long start = now_ns();
    pid_t child = fork();
    if (child == 0) {
        execv(words[1], words + 1);
        perror(words[1]);
        /* Not exit, which would turn the list back to where this process read it. */
        _exit(127);
    }
    waitpid(child, &status, 0);
    if (strcmp(words[0], "-"))
        report(words[0], now_ns() - start, (unsigned long long)status);
    if (status)
        printf("! %s ended with %x\n", line, status);
}

static void run_all(FILE *list)
{
    char line[4096];
    while (list && fgets(line, sizeof line, list))
        run(line);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("LC_ALL", "C.UTF-8", 1);
    setenv("HOME", "/root", 1);
    if (argc == 4 && !strcmp(argv[1], "--native")) {
        FILE *list = fopen(argv[3], "re");
        if (strcmp(argv[2], "/"))
            enter(argv[2]);
        run_all(list);
        return 0;
    }
    mount_kernel("");
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; console >= 0 && fd < 3; fd++)
        dup2(console, fd);
    report("init", now_ns(), 0);
    load_modules();
    FILE *list = fopen("/commands", "re");
    if (!access("/disk-is-root", F_OK)) {
        mount_at("ext4", "/dev/vda", "/root");
        mount_kernel("/root");
        enter("/root");
    }
    run_all(list);
    report("end", now_ns(), 0);
    sync();
    reboot(RB_POWER_OFF);
    return 1;
}
