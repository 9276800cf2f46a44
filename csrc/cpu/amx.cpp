// Compiled for any x86-64 CPU: it decides whether the rest may run.
#include "amx.h"

#include <cpuid.h>
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace nsru::cpu {

namespace {

constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;               // XFEATURE_XTILEDATA

bool has(unsigned leaf, unsigned subleaf, int reg, int bit) {
    unsigned registers[4] = {};  // eax, ebx, ecx, edx
    if (!__get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2],
                           &registers[3]))
        return false;
    return registers[reg] >> bit & 1;
}

bool has_instructions() {
    const bool avx512 = has(7, 0, 1, 16) && has(7, 0, 1, 30) && has(7, 0, 1, 31);  // F, BW, VL
    return avx512 && has(7, 1, 0, 5) && has(7, 0, 3, 22) && has(7, 0, 3, 24);      // BF16, AMX
}

std::string find_reason() {
    if (!has_instructions())
        return "this CPU has no AMX-BF16 (Intel Xeon, 4th generation or newer)";
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
        return "the operating system does not let this process use AMX (Linux 5.16 or newer does)";
    if (dlsym(RTLD_DEFAULT, "GOMP_parallel") == nullptr)
        return "this PyTorch has loaded no OpenMP runtime whose threads could be shared";
    return "";
}

}  // namespace

std::string unavailable() {
    static const std::string reason = find_reason();
    return reason;
}

}  // namespace nsru::cpu
