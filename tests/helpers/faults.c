// Preloaded into a process: counts the calls that change a folder; at the nth one the process is killed, or it fails.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum Kind { COUNT, KILL, KILL_HALFWAY, FULL_DISK, READ_ONLY };

static char folder[4096];
static enum Kind kind;
static long at;
static atomic_long seen, unflushed;
static atomic_ulong dirty[256];  // inodes that were written to and not flushed since

void faults_arm(const char *where, int what, long nth) {
  snprintf(folder, sizeof folder, "%s", where);
  kind = what;
  at = nth;
  seen = 0;
}
// How many files were renamed before what was written to them was flushed to the disk.
long faults_unflushed(void) { return unflushed; }

static ino_t inode_of(int file, const char *path) {
  struct stat about;
  return (path ? stat(path, &about) : fstat(file, &about)) ? 0 : about.st_ino;
}
static void mark(ino_t inode, int is_dirty) {
  for (int i = 0; i < 256; ++i)
    if (dirty[i] == inode || (is_dirty && !dirty[i])) {
      dirty[i] = is_dirty ? inode : 0;
      if (is_dirty) return;
    }
}
static int is_dirty(ino_t inode) {
  for (int i = 0; i < 256; ++i)
    if (dirty[i] == inode) return 1;
  return 0;
}

static int path_concerns(int parent, const char *path) {
  char base[4096];
  if (!folder[0] || !path) return 0;
  if (path[0] == '/') return strstr(path, folder) != NULL;
  if (parent == AT_FDCWD) return 0;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", parent);
  ssize_t length = readlink(link, base, sizeof base - 1);
  if (length < 0) return 0;
  base[length] = 0;
  return strstr(base, folder) != NULL;
}
static int file_concerns(int file) { return folder[0] && path_concerns(file, "."); }

// Whether the call must fail, with errno. Does not return if the process is killed.
static int fails(int concerns, int makes_data) {
  if (!concerns) return 0;
  long now = ++seen;
  if (kind == KILL && now == at) raise(SIGKILL);
  if (kind == FULL_DISK && now >= at && makes_data) return errno = ENOSPC, 1;
  if (kind == READ_ONLY && now >= at) return errno = EROFS, 1;
  return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                                        \
  int name(const char *path, int flags, ...) {                                                            \
    va_list rest;                                                                                         \
    va_start(rest, flags);                                                                                \
    mode_t mode = va_arg(rest, mode_t);                                                                   \
    va_end(rest);                                                                                         \
    if ((flags & (O_CREAT | O_TRUNC)) && fails(path_concerns(AT_FDCWD, path), access(path, F_OK))) return -1; \
    return REAL(name)(path, flags, mode);                                                                 \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                      \
  int name(int parent, const char *path, int flags, ...) {                                                \
    va_list rest;                                                                                         \
    va_start(rest, flags);                                                                                \
    mode_t mode = va_arg(rest, mode_t);                                                                   \
    va_end(rest);                                                                                         \
    if ((flags & (O_CREAT | O_TRUNC)) && fails(path_concerns(parent, path), faccessat(parent, path, F_OK, 0))) \
      return -1;                                                                                          \
    return REAL(name)(parent, path, flags, mode);                                                         \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t bytes) {
  int concerns = file_concerns(file);
  if (concerns && kind == KILL_HALFWAY && seen + 1 >= at) {
    REAL(write)(file, data, bytes / 2);
    raise(SIGKILL);
  }
  if (fails(concerns, 1)) return -1;
  if (concerns) mark(inode_of(file, NULL), 1);
  return REAL(write)(file, data, bytes);
}
int fsync(int file) {
  if (fails(file_concerns(file), 0)) return -1;
  if (file_concerns(file)) mark(inode_of(file, NULL), 0);
  return REAL(fsync)(file);
}
int ftruncate(int file, off_t size) { return fails(file_concerns(file), 0) ? -1 : REAL(ftruncate)(file, size); }
int rename(const char *from, const char *to) {
  int concerns = path_concerns(AT_FDCWD, to);
  if (concerns && is_dirty(inode_of(0, from))) ++unflushed;
  return fails(concerns, 0) ? -1 : REAL(rename)(from, to);
}
int link(const char *from, const char *to) {
  return fails(path_concerns(AT_FDCWD, to), 1) ? -1 : REAL(link)(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
  return fails(path_concerns(b, to), 1) ? -1 : REAL(linkat)(a, from, b, to, flags);
}
int unlink(const char *path) { return fails(path_concerns(AT_FDCWD, path), 0) ? -1 : REAL(unlink)(path); }
int unlinkat(int parent, const char *path, int flags) {
  return fails(path_concerns(parent, path), 0) ? -1 : REAL(unlinkat)(parent, path, flags);
}
int mkdir(const char *path, mode_t mode) {
  return fails(path_concerns(AT_FDCWD, path), 1) ? -1 : REAL(mkdir)(path, mode);
}
int rmdir(const char *path) { return fails(path_concerns(AT_FDCWD, path), 0) ? -1 : REAL(rmdir)(path); }
