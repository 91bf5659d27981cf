// NVRTC declares the functions of this header by itself.
#pragma once
